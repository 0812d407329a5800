"""From statistics to trained models: the planner, the networks, and the one trainer."""
