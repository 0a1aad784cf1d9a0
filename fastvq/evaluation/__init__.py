"""How good a model is: likelihood, reconstruction, sample metrics, classification accuracy, rejection sampling."""

from fastvq.evaluation.accuracy import classification_accuracy
from fastvq.evaluation.evaluate import AccuracyPlan, Evaluation, EvaluationConfig, evaluate
from fastvq.evaluation.features import ClassifierFeatures, FeatureExtractor, Features
from fastvq.evaluation.gaussian import GaussianStatistics, frechet_distance
from fastvq.evaluation.inception import InceptionFeatures
from fastvq.evaluation.likelihood import ImageMetrics, LevelMetrics, measure_images
from fastvq.evaluation.neighbours import ManifoldScores, manifold_scores, nearest_neighbours
from fastvq.evaluation.rejection import CurvePoint, RejectionSamples, rejection_curve, sample_with_rejection
from fastvq.evaluation.report import check_report, render_report, write_report
from fastvq.evaluation.scores import InceptionScore, Score, kernel_distance
from fastvq.evaluation.shards import samples_from_shards, score_shard, shard_settings, statistics_from_shards
from fastvq.evaluation.sources import DrawnSamples, Reconstructions, draw_samples, labels_by_frequency
from fastvq.evaluation.statistics import FeatureStatistics, SetScores, compare, dataset_statistics, gather

__all__ = [
    "AccuracyPlan",
    "ClassifierFeatures",
    "CurvePoint",
    "DrawnSamples",
    "Evaluation",
    "EvaluationConfig",
    "FeatureExtractor",
    "FeatureStatistics",
    "Features",
    "GaussianStatistics",
    "ImageMetrics",
    "InceptionFeatures",
    "InceptionScore",
    "LevelMetrics",
    "ManifoldScores",
    "Reconstructions",
    "RejectionSamples",
    "Score",
    "SetScores",
    "check_report",
    "classification_accuracy",
    "compare",
    "dataset_statistics",
    "draw_samples",
    "evaluate",
    "frechet_distance",
    "gather",
    "kernel_distance",
    "labels_by_frequency",
    "manifold_scores",
    "measure_images",
    "nearest_neighbours",
    "rejection_curve",
    "render_report",
    "sample_with_rejection",
    "samples_from_shards",
    "score_shard",
    "shard_settings",
    "statistics_from_shards",
    "write_report",
]
