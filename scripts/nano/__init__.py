"""The scripts that make `nano`, the small causal language model that ships inside lorica.

In: the public text in ../shared/data (never committed).  Out: src/lorica/models/nano.
Run, in this order: corpus, pretrain, export, report (each `python -m scripts.nano.NAME --help`).
This package refuses to know lorica: nothing here imports it, and lorica imports nothing from here.
"""
