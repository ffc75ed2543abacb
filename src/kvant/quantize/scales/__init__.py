"""Static KV scales in files: `files` reads and writes them, the other modules each know one layout."""
