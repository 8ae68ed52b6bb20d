"""Text, measurement and reports: what goes into a model to measure it, and what is said about it afterwards."""
