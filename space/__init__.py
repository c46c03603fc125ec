"""Parts of the Space's page: reading tools, asking the model, drawing what happened. `app.py` puts them together."""
