"""llama.cpp: its library, its file format, its runs. Everything here needs the extras `gguf` or `llama-cpp` (running), but for `names`."""
