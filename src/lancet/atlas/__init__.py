"""What a corpus says about every feature of an SAE: harvested into a folder, read, named."""
