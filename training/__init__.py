"""Training: data, base pre-training and the head. Imports the model's modules; nothing imports this package but `train_hf.py`."""
