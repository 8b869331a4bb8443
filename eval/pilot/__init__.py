"""A pilot: what a model does on a person's own documents, and which remedy they should use, within a time that they
name. It plans with what there is: losses over length, recall, a probe of the heads, remedies and controls."""
