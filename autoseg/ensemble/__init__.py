"""Out-of-fold scores, choosing and combining models, predicting new images, scoring folders."""
