"""From a request to a row of results: media, processor, batches, the queue of batches."""
