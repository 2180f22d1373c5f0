"""ONNX: a graph beside safetensors files, whose initializers are their bytes.

`example.py` what a graph is traced with · `trace.py` module -> graph (torch.onnx) · `refusal.py` why it has none ·
`writes.py` what it changes as it runs · `graph.py` the graph made small and named · `slots.py` places for adapters ·
`stored.py` tensors in the files · `link.py` its initializers there · `quantized.py` nodes that decode them ·
`links.py` are they still there? · `runtime.py` and `child.py` run it, in another process.
"""
