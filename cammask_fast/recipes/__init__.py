"""Recipes: one TOML file per run of the paper or of the embedded benchmark."""
