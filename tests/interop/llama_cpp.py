"""llama.cpp itself, through cyllama's wheel: an independent implementation of what we export."""

import functools

import numpy as np


class LlamaCpp:
    """A GGUF file in llama.cpp on the CPU, with a float32 cache and without flash attention."""

    def __init__(self, path, length=256):
        llama, model_class = _library()
        params = llama.LlamaModelParams()
        params.n_gpu_layers = 0
        self._llama = llama
        self._model = model_class(str(path), params)
        self._length = length
        self.vocabulary = self._model.get_vocab()
        self.template = self._model.get_default_chat_template()

    def tokenize(self, text, specials=False):
        """Returns the ids of a text. With `specials`, special tokens in it are found."""
        return self.vocabulary.tokenize(text, add_special=False, parse_special=specials)

    def logits(self, tokens):
        """Returns the logits after each token, [t, v]. Each is decoded on its own."""
        context = self._context()
        return np.array([self._step(context, i, t) for i, t in enumerate(tokens)])

    def greedy(self, prompt, n, eos=-1):
        """Returns at most n tokens after a prompt, the last of them perhaps eos."""
        context = self._context()
        for i, token in enumerate(prompt):
            logits = self._step(context, i, token)
        response = []
        while len(response) < n and eos not in response:
            response.append(int(np.argmax(logits)))
            logits = self._step(context, len(prompt) + len(response) - 1, response[-1])
        return response

    def _context(self):
        params = self._llama.LlamaContextParams()
        params.n_ctx = params.n_batch = self._length
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0
        return self._llama.LlamaContext(self._model, params)

    def _step(self, context, position, token):
        context.decode(self._llama.llama_batch_get_one([int(token)], position))
        return np.array(context.get_logits_ith(-1))


def quantized(path, target):
    """Writes a file with the matrices of a float32 file as Q8_0, by llama.cpp's own quantizer."""
    llama, _ = _library()
    params = llama.LlamaModelQuantizeParams()
    params.ftype = 7  # MOSTLY_Q8_0
    llama.model_quantize(str(path), str(target), params)
    return target


@functools.cache
def _library():
    import cyllama.llama.llama_cpp as llama

    llama.disable_logging()

    class Model(llama.LlamaModel):
        """`get_logits_ith` of cyllama 0.2.18 asks the model for n_vocab, which it lacks."""

        @property
        def n_vocab(self):
            return self.get_vocab().n_vocab

    return llama, Model
