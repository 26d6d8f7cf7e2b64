"""Text in, numpy out: tokenizers, corpora, token shards on disk, chunks and batches. Nothing here imports jax.

tokenizer   text <-> ids: bytes, byte-level BPE, any tokenizer.json, tiktoken rank files
corpus      a source named by the user -> a stream of documents cut into pieces (python_docs, files, hub bring them)
prepare     a source -> a folder of memory-mapped token shards with a manifest; survives kill -9
shards      that folder, opened for reading
chunking    prompts -> chunks of K tokens
batches     seeded, resumable training batches; evaluation blocks
"""
