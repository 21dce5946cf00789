"""Export an output in formats that other tools load."""
