"""Train a small byte-level GPT on real text with torch.optim and with fused, side by side.

``text`` and ``model`` need PyTorch alone and can be used elsewhere; ``report`` needs rich and matplotlib when called.
"""
