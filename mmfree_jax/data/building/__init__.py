"""What builds token sets: sources of text, cleaning, deduplication, parallel tokenisation, packing, the writer."""
