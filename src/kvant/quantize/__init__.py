"""What is measured of a model and made from it, so that it takes less memory."""
