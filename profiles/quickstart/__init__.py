"""The embedded default: an assistant that turns an utterance into one function call in JSON.

`grammar` is the language (functions, slots, phrasings), `make_data` writes the data sets, `train_teacher`
trains the teacher that is committed beside them. Nothing of compress, deploy or evaluators imports this.
"""
