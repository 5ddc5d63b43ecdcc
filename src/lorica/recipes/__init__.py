"""Recipes: readable training programs that speak to clients only, each as a flat loop and as a configurable version."""
