"""The one engine: from a plan and its cases to trained and scored weights."""
