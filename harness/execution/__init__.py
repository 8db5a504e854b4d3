"""How a network is run: precision, preprocessing, compilation, evaluation."""
