"""Training: data, base pre-training and the head. Imports the model's modules; the model never imports it."""
