"""The formulas, each alone: tensors in, tensors out, no model and no state; and the recipes that name them."""
