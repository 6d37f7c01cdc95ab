// What libraries name of libcudart.so.13 and no call here may need: FlashInfer 0.7.2's module to
// capture its tactics into graphs, CuTe-DSL's runtime since one archive has all that its compiler can
// emit. Written down and refused.

#include "state.h"

using recording::Refuse;

#define REFUSED(name) \
  EXPORT int name() { return Refuse(#name); }

REFUSED(cudaDriverGetVersion)
REFUSED(cudaEventCreate)
REFUSED(cudaEventCreateWithFlags)
REFUSED(cudaEventDestroy)
REFUSED(cudaEventElapsedTime)
REFUSED(cudaEventQuery)
REFUSED(cudaEventRecord)
REFUSED(cudaEventRecordWithFlags)
REFUSED(cudaEventSynchronize)
REFUSED(cudaFreeAsync)
REFUSED(cudaFreeHost)
REFUSED(cudaGetDeviceProperties)
REFUSED(cudaGraphAddKernelNode)
REFUSED(cudaGraphAddNode)
REFUSED(cudaGraphConditionalHandleCreate)
REFUSED(cudaGraphCreate)
REFUSED(cudaGraphExecDestroy)
REFUSED(cudaGraphGetEdges)
REFUSED(cudaGraphGetNodes)
REFUSED(cudaGraphInstantiate)
REFUSED(cudaGraphKernelNodeGetAttribute)
REFUSED(cudaGraphKernelNodeSetAttribute)
REFUSED(cudaGraphLaunch)
REFUSED(cudaGraphNodeGetDependencies)
REFUSED(cudaLibraryGetGlobal)
REFUSED(cudaLibraryGetKernelCount)
REFUSED(cudaLibraryGetManaged)
REFUSED(cudaLibraryGetUnifiedFunction)
REFUSED(cudaLibraryLoadFromFile)
REFUSED(cudaMallocAsync)
REFUSED(cudaMallocManaged)
REFUSED(cudaMemcpy3D)
REFUSED(cudaMemcpy3DAsync)
REFUSED(cudaOccupancyMaxActiveBlocksPerMultiprocessor)
REFUSED(cudaProfilerStart)
REFUSED(cudaProfilerStop)
REFUSED(cudaStreamAddCallback)
REFUSED(cudaStreamBeginCaptureToGraph)
REFUSED(cudaStreamCreate)
REFUSED(cudaStreamGetCaptureInfo)
REFUSED(cudaStreamUpdateCaptureDependencies)
REFUSED(cudaStreamWaitEvent)
