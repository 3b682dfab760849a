"""What is wanted: frozen data, each part with its meaning in plain torch."""
