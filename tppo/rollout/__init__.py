"""Rows of a step from plan to tokens: the protocol of engines, the engines, and what drives them."""
