"""Files to records, records to tokens with loss weights, tokens to packed batches. Knows no model and never imports
torch.
"""
