"""llama.cpp: its library, its file format, its runs. Everything here needs `pip install 'bitatlas[gguf]'`, but for `names`."""
