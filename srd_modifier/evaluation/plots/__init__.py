"""Pictures of a comparison, and of what a model's modules cost, sized for the column of a model card.

comparison  all pictures of a comparison: draw_all
quality     quality against bytes on disk
depth       divergence after each decoder layer
heatmap     the predicted damage of each module
pareto      the models that no other beats in size and in quality
style       colours, markers, fonts and sizes
labels      names beside their points
legend      what lines and markers mean, below the axes
files       the check of a picture's name, and the write
"""
