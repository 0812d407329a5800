"""A trained model in the forms that other tools read."""
