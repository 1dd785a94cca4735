"""The transfer engine: one-sided writes into registered memory of a peer, over reliable but unordered transports, completed by count.

After TransferEngine (arXiv 2510.27656): no world and no ranks, no order, immediates that are counted.
"""
