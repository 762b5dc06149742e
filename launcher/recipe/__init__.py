"""What was asked: the recipe, its schema and its loader."""
