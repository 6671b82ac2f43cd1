"""Carrying a head into the engines: what they lack, how they measure, where served and trained figures part."""
