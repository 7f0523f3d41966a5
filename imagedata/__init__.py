"""Image data sets: what one is, where they come from, and how batches are cut from them."""
