"""What goes to a hub: model cards, and the upload of an adapter or a merged model."""
