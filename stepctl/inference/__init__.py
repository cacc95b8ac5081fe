"""Using a trained run: predictions, evaluation on other data, samples, export."""
