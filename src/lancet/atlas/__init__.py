"""The atlas: what a corpus says about every feature of one SAE (docs/atlas.md has its files)."""
