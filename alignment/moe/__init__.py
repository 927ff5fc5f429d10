"""Expert-parallel training of mixture-of-experts models, and their export to ordinary model folders."""
