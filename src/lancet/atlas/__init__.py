"""The atlas: what a large corpus says about every feature of an SAE, in files (docs/atlas.md)."""
