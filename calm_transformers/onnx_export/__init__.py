"""ONNX export. A model that can't be exported raises an InputError; docstrings of export.py don't repeat it."""
