"""What the classifier's output is driven towards: the loss of each image and where its gradient starts."""
