"""The OpenAI-compatible server behind `serve.py`: protocol, engine of a replica, HTTP application, Ray's replicas."""
