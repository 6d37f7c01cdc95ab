// What FlashInfer 0.7.2's module needs of libcudart.so.13 beyond 0.6.13's: the graphs that its
// tactics are captured into, which no call here asks for. Written down and refused.

#include "state.h"

using recording::Refuse;

EXPORT const char* cudaGetErrorName(int error) { return recording::Describe(error); }

#define REFUSED(name) \
  EXPORT int name() { return Refuse(#name); }

REFUSED(cudaGraphAddNode)
REFUSED(cudaGraphConditionalHandleCreate)
REFUSED(cudaGraphGetEdges)
REFUSED(cudaGraphGetNodes)
REFUSED(cudaGraphNodeGetDependencies)
REFUSED(cudaStreamBeginCaptureToGraph)
REFUSED(cudaStreamGetCaptureInfo)
REFUSED(cudaStreamUpdateCaptureDependencies)
