"""ONNX: a graph beside safetensors files, whose initializers are their bytes.

`example.py` what a graph is traced with · `trace.py` module -> graph (torch.onnx) · `refusal.py` why it has none ·
`graph.py` the graph made small and named · `slots.py` places for adapters · `stored.py` tensors in the files ·
`link.py` its initializers there · `quantized.py` nodes that decode them · `links.py` are they still there? ·
`runtime.py` and `child.py` run it, in another process.
"""
