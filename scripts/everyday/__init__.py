"""The generator of the data set `everyday`: requests in plain English and the JSON calls that answer them.

In: the word lists and sentence templates of this package. Out: src/lorica/data/everyday/{train,test}.jsonl.
`python -m scripts.everyday` writes both files; with `--check` it writes nothing and says which file is stale or wrong.
This package refuses to know lorica: nothing here imports it, and lorica imports nothing from here.
"""
