"""The settings: every one typed and documented once, read strictly, and the templates that plans fill."""
