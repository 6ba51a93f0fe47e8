"""Next-item recommendation: interactions, ranking over the whole catalogue, sequence encoders."""
