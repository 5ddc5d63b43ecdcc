"""The scripts that make the generated parts of the documentation.

`reference` writes docs/reference from the code; `measure_methods` fills in what the method pages say was measured.
"""
