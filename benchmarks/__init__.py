"""Side-by-side measurements of the fused losses, the training step and the input pipeline."""
