"""The model repository of gRefCOCO: ReLA for GRES and GREC as transformers classes."""
