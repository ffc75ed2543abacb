"""What can be computed: one contract (`ops`), several makers."""
