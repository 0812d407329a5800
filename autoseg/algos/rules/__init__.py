"""The planner's rules: each sets one or a few keys of a draft, and says by which rule and source."""
