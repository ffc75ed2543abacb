"""From files to a `Decoder`: sources, codecs, loading."""
